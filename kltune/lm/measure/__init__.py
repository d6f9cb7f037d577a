"""How far a policy is from its reference: measured, broken down, interpolated, beside best of n."""
