"""How many bytes an element of a dtype takes, by the name that PyTorch, a plan or a profile has for it."""

DTYPE_BYTES = {
    "double": 8, "long": 8, "long int": 8, "int64": 8, "float64": 8, "complexfloat": 8,
    "float": 4, "int": 4, "int32": 4, "float32": 4,
    "half": 2, "bfloat16": 2, "short": 2, "float16": 2, "c10::half": 2, "c10::bfloat16": 2,
    "byte": 1, "char": 1, "bool": 1, "uint8": 1, "int8": 1, "signed char": 1, "unsigned char": 1,
    "float8": 1, "float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1,
}  # fmt: skip
