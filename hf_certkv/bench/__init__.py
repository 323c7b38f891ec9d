"""`certkv bench`: this cache, the dense one and transformers' quantised ones, timed side by side in one process."""
