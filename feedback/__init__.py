"""What people say: the feedback tables, the chat service with its page, batches and snapshots."""
