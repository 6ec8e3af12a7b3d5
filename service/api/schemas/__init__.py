"""What requests and responses look like. Request models refuse unknown fields and convert nothing."""
