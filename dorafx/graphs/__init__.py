"""What any FX graph can say of itself; there is no DoRA in it."""
