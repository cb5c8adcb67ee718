"""One file an exhibit: ABOUT (a literal), build(mesh=None, fault=True), after(mesh=None); of a whole step
also step()."""
