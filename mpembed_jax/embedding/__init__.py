"""The verbs over the state of a stack, and what they are made of."""
