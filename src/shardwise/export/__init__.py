"""A plan and its case, written for a framework: a Plan whose rules were resolved on the model -> files. What
a framework's format can't say is replaced by the nearest plan that it can, and named.

code.py writes Python; torch_styles.py says a plan in PyTorch's own styles; a format is a file of formats/.
"""
