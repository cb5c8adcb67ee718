"""An Explanation or a Contrast, drawn."""
