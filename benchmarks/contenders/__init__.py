"""What this project's server is measured against: other people's engines behind the smallest HTTP apps."""
