"""`memento convert`: raw chain-of-thought traces to training data, through any LLM."""

RULES = "rules"  # as a model's name: none is asked
