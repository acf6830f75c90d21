"""Floor 2. The linear algebra of a T5: linears, norms, attention, vocabulary, counted randomness.

Layers know shapes and declare how their parameters may be sliced; they know nothing of experts'
routing, of the model's depth, or of data.
"""
