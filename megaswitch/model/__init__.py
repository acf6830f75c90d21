"""Floor 3. The Switch Transformer: routing, dispatch, experts, blocks, and their assembly.

Names no rank, group or collective. Reading order: `moe.py`, then `switch_transformer.py`.
"""
