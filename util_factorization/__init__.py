# What --method may be; here, where --help can read it without importing torch. decompose.py says what each one is.
METHODS = ("svd", "centered", "freq")
