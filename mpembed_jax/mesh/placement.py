"""The user's choice of how a stack lies over a mesh of devices."""

import dataclasses

KINDS = ("rows", "tables", "replicated")


@dataclasses.dataclass(frozen=True)
class Placement:
    """The placement of one stack over a mesh.

    `sharding.plan` chooses one from sizes and measured skew.

    Attributes:
      kind: "rows" (row r on shard r mod P), "tables" (each table whole on one shard) or
        "replicated" (all rows on every device).
      capacity: how many ids a device can send to one shard in a step, as a multiple of an even
        share. The even share of a device with room for n unique ids is n / P. In a step in which
        any device needs more, all devices exchange full-width arrays instead, and the step is
        counted.
      batch_axes: mesh axes over which batches are divided; None for all axes of the mesh. Name
        either all axes that divide rows, or none of them. If you name none of them, all devices
        along these axes must have the same ids.
      table_shards: for "tables", the shard of each table. None: tables are placed from the largest
        to the smallest, each on the shard with the fewest rows.
      summation_blocks: None: gradients are summed per device, then over devices. A number: the
        batch is cut into this many equal blocks along the leading axis of its ids. Gradients are
        summed within blocks, then over blocks in order. The sums then have the same bits on any
        number of devices that divides the number of blocks, if the gradients of the vectors have.
        (Dense layers may round these differently in batches of another size.) This is slower,
        because a row used by several blocks of one device travels once for each of them.

    Raises:
      ValueError: if the kind is unknown, if capacity or summation_blocks is out of range, or if
        table_shards is given for another kind than "tables".
    """

    kind: str = "rows"
    capacity: float = 1.25
    batch_axes: tuple[str, ...] | None = None
    table_shards: tuple[int, ...] | None = None
    summation_blocks: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"placement kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if not self.capacity > 0:
            raise ValueError(f"placement capacity must be above 0, got {self.capacity}")
        if self.summation_blocks is not None and self.summation_blocks < 1:
            raise ValueError(
                f"summation_blocks must be at least 1 or None, got {self.summation_blocks}"
            )
        if self.table_shards is not None and self.kind != "tables":
            raise ValueError(f'table_shards needs kind="tables", got kind={self.kind!r}')
        for name in ("batch_axes", "table_shards"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
