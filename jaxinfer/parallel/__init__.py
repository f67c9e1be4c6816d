"""Models over several devices and machines. So far the planning side of HexGen (`ji.hexgen`)."""
