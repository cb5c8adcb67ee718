"""A VerificationRun, drawn."""
