# What --method may be, and what its help needs; here, where --help reads it without importing torch. decompose_table.py says
# what each method is.
METHODS = ("svd", "centered", "freq", "whiten", "joint", "fisher")
CALIBRATED = METHODS[3:]  # these read calibration text
JOINT_LAMBDA = 0.3
