"""FP8, which nothing here uses."""


def cast_to_fp8():
    raise NotImplementedError
