"""How a plan is applied to a module: styles, differentiable collectives, both engines."""
