"""What DeepSpeed keeps on a rank's device beside the computation itself, read off its source (0.19).

P are the trained elements, S = P / ranks those that this rank updates, and `bytes` is 2 in bfloat16, where DeepSpeed
converts every parameter, the adapter's too, and 4 in float32.

|                        | ZeRO-0   | ZeRO-1, 2                           | ZeRO-3                                   |
|------------------------|----------|-------------------------------------|------------------------------------------|
| trained parameters     | P bytes  | P bytes (views of one flat buffer)  | S bytes, and P bytes of a whole adapter  |
| float32 master copy    | -        | 4 S, in float32 as well             | 4 S in bfloat16; in float32 the shard is |
| Adam's two moments     | 8 P      | 8 S                                 | 8 S                                      |
| gradients              | P bytes  | 1: P bytes; 2: S bytes              | S bytes, always there                    |
| bucket for reduction   | -        | from the first gradient to the last | always there                             |
"""

from __future__ import annotations

from dataclasses import dataclass

# DeepSpeed's defaults for ZeRO-3, which the project leaves as they are: so many gathered elements may live at a time
# (stage3_max_live_parameters), and parameters used again within as many (stage3_max_reuse_distance) are not released.
MAX_LIVE_PARAMETERS = 10**9
# It updates so many elements at a time (sub_group_size).
SUB_GROUP = 10**9
FLOAT32 = 4
MOMENTS = 2 * FLOAT32


@dataclass(frozen=True)
class Held:
    """Of one rank.

    Attributes:
        trained: P, elements.
        largest: elements of the largest trained tensor.
        frozen_bytes: of the frozen parameters and of the buffers, as one process holds them.
        bytes: of an element that takes part in the computation.
        zero_stage: 0 to 3.
        world_size: ranks.
        offload: whether optimiser states (and under ZeRO-3 parameters) lie in the host's memory.
        bucket: elements of the buffer for reduction.
    """

    trained: int
    largest: int
    frozen_bytes: int
    bytes: int
    zero_stage: int
    world_size: int
    offload: bool
    bucket: int

    @property
    def share(self) -> int:
        """S, elements."""
        return -(-self.trained // self.world_size)

    @property
    def base(self) -> int:
        if self.zero_stage < 3:
            return self.frozen_bytes
        return 0 if self.offload else -(-self.frozen_bytes // self.world_size)

    @property
    def adapter(self) -> int:
        """The trained parameters. Under ZeRO-3 those of an adapter stay whole besides, below the threshold of
        persistence that the project sets; a model that is trained as a whole does not."""
        if self.zero_stage < 3:
            return self.trained * self.bytes
        shard = 0 if self.offload else self.share * self.bytes
        return shard + (self.trained * self.bytes if self.frozen_bytes else 0)

    @property
    def master(self) -> int:
        if self.offload or self.zero_stage == 0 or (self.zero_stage == 3 and self.bytes == FLOAT32):
            return 0
        return FLOAT32 * self.share

    @property
    def moments(self) -> int:
        if self.offload:
            return 0
        return MOMENTS * (self.share if self.zero_stage else self.trained)

    @property
    def gathered(self) -> int:
        """ZeRO-3's parameters that are whole for the moment: as many as DeepSpeed lets live, an upper bound."""
        if self.zero_stage < 3:
            return 0
        sharded = self.frozen_bytes or self.trained * self.bytes
        return min(MAX_LIVE_PARAMETERS * self.bytes, sharded)

    def gradients(self, begun: bool, accumulated: bool) -> int:
        """Gradients and their bucket during a micro-batch, without what autograd itself holds.

        Args:
            begun: whether the first gradient has come: it brings the bucket of ZeRO-1 and 2 with it.
            accumulated: whether an earlier micro-batch has left gradients.
        """
        kept = 0 if self.offload else self.share
        elements = 0
        if self.zero_stage == 3:
            elements = self.bucket + kept
        elif self.zero_stage:
            elements = self.bucket * begun + self.largest * self.offload
        if self.zero_stage == 2:  # what has been reduced before the last micro-batch, and of it when the bucket is full
            elements += kept * accumulated + kept * (begun and self.trained > self.bucket)
        return elements * self.bytes

    @property
    def update_gradients(self) -> int:
        """Gradients while the optimiser's step is prepared or runs, whichever takes more.

        ZeRO-1 and 2 flatten them (S bytes beside the S bytes there) and convert them to float32 (4 S); ZeRO-3 converts
        a sub-group at a time.
        """
        if self.zero_stage == 0:
            return self.trained * self.bytes
        if self.offload or self.zero_stage == 3:
            converted = 0 if self.offload or self.bytes == FLOAT32 else FLOAT32 * min(self.share, SUB_GROUP)
            return self.gradients(begun=False, accumulated=False) + converted
        return 2 * FLOAT32 * self.share  # 2 + 2 + 4 in bfloat16; in float32 the flat copy needs no conversion: 4 + 4

    @property
    def update_scratch(self) -> int:
        """torch's AdamW (foreach) takes the square root of the second moment into a tensor of its own. In ZeRO-1 and 2
        the copies that `update_gradients` counts are gone by then and have left as much room."""
        if self.offload or self.zero_stage in (1, 2):
            return 0
        return FLOAT32 * (min(self.share, SUB_GROUP) if self.zero_stage else self.trained)
