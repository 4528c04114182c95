"""task=train_transcoders and task=plan: batches, caches, cards, and what training needs."""
