"""The engine: a scheduler, a runner, and the actor around them."""
