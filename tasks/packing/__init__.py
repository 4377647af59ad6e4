"""From documents to training instances: tokenizer, budgets, replay, packing."""
