"""Chunk maths and tile layouts of matrix-valued states, which several families are made of."""
