"""The KV cache: layouts, block pools, the prefix cache, reservations, and the lanes that move pages."""
