"""Admin state: keywords with their bindings, rules and synonyms; where it is kept, edited, and applied to requests."""
