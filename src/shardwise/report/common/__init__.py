"""What the reports of all verbs share: documents, units, what every page has."""
