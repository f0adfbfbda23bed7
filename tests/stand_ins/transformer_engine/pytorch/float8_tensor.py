"""FP8, which nothing here uses."""


class Float8Tensor:
    pass
