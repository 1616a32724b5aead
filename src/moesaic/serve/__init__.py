"""Our own architecture in serving engines, through their plugins."""
