"""What `fastserve-mega chat` and `top` show of a running server in a terminal."""
