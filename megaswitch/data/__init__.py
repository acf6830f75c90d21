"""Floor 3. Text on disk to `Seq2SeqBatch`: tokenizer, preprocessing, token store, sampler.

Knows nothing of models, ranks or groups: a batch is a pure function of global sample indices.
"""
