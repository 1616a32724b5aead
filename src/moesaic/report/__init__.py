"""What is known of a converted model, as one HTML page that needs nothing else. No torch here."""
