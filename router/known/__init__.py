"""What a router learns of its fleet while it serves: loads, lengths of answers, transfers, prompts that repeat."""
