"""What a user may say about how a stack lies over a mesh of devices."""

import dataclasses

KINDS = ("rows", "tables", "replicated")


@dataclasses.dataclass(frozen=True)
class Placement:
    """How one stack is placed over a mesh; `sharding.plan` fills it in from sizes and measured skew.

    Attributes:
      kind: "rows" (row r on shard r mod P), "tables" (each table whole on one shard) or "replicated" (all rows everywhere).
      capacity: room of the exchange, as a multiple of an even share of a device's unique-id budget per owner; in a step in
        which any device has more, all exchange arrays of full width instead, and that is counted.
      batch_axes: mesh axes over which batches are divided; None: all axes of the mesh. A sharding axis that is not among
        them sees the same ids on all its devices.
      table_shards: with "tables": the shard of each table; None: filled largest first onto the emptiest shard.
      summation_blocks: None: gradients are summed per device, then over devices. A number: the batch is cut into as many
        equal blocks along the leading axis of its ids, sums are taken within blocks and then over blocks in order, so the
        result has the same bits for every number of devices that divides it (from the same gradients of the vectors:
        dense layers may round otherwise in batches of another size); slower, since a row used by several blocks of one
        device travels once for each.

    Raises:
      ValueError: on an unknown kind or a number out of range.
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
            raise ValueError(f'table_shards goes with kind="tables", got kind={self.kind!r}')
        for name in ("batch_axes", "table_shards"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
