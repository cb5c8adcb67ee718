"""ONE training step: loss, backward, gradient reduction, clipping, optimizer. What is measured is what is
verified."""
