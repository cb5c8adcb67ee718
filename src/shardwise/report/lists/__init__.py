"""What there is to choose from, as tables: models, plans, machines, and a machine's constants."""
