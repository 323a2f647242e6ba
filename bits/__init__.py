"""
A matrix by bits: in the coordinates of a `fisher` basis each component gets as many bits as its error is worth to the loss.

    budget                  which component gets the next bit
    trellis, packing        codes of b bits for numbers, from gaussian_codes.npz; their streams in bytes
    predicted_rows          rows of a token table that are predicted from other rows
    coded_matrix            a matrix kept so: stored, looked up, multiplied
    encode                  matrices into bits: importance, one budget for all, rounding
    integers                plain quantisation, the control
    modules                 the layers of a packed model
    gaussian_codes.npz      the levels of all codes

A *depth* is the number of bits of a column; a *group* is a set of rows with the same depths.
"""
