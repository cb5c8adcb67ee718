"""How a walk-through is drawn: in the terminal, and as a page. Imports no torch."""
