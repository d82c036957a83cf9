"""DeepSpeed ZeRO-3: the engine and the shards."""
