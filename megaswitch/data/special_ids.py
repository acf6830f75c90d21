"""T5's ids with a meaning of their own; a module of its own, as torch is not needed to tokenize."""

PAD_ID = 0
EOS_ID = 1
UNK_ID = 2
