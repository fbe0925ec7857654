"""Memory: bytes of a stack before it is made, and a choice of stacks that fits a budget.

`report` counts the bytes of one stack. `plan` chooses formats, caches and placements for tables.
`python -m mpembed_jax.memory plan FILE --budget 16GB` does so for a file of tables.
"""

from mpembed_jax.memory.planner import Choice, Plan, plan
from mpembed_jax.memory.reports import Report, report

__all__ = ["Choice", "Plan", "Report", "plan", "report"]
