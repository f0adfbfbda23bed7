"""What a deployment is: its configuration, and what follows from it without a device."""
