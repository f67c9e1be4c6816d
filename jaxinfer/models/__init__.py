"""The decoder-only transformer and the families it covers."""
