"""
A matrix stored with few bits per number. The columns are components in the basis of `fisher`: a component whose error costs the
loss more gets more bits.

    budget                  which component gets the next bit
    trellis, packing        codebooks of b bits, from gaussian_codes.npz; how their streams become bytes
    predicted_rows          rows of a token table that are predicted from other rows
    coded_matrix            a quantised matrix: stored, looked up, multiplied
    encode                  quantises matrices: importance, one budget for all, rounding
    integers                plain quantisation, the control
    modules                 the layers of a packed model
    gaussian_codes.npz      the levels of all codebooks

A *level* is a value that a quantised number can have.
A *codebook* (class Code) lists the level of each bit pattern, for one number of bits.
A *depth* is the number of bits that each number of a column gets, counted in half bits.
A *group* is a set of rows that share the depths of all columns.
A *stream* holds the bits of the numbers of one column in one group.
A *scale* is a number that multiplies levels: of a column in a group, of a row, or of a token.
"""
