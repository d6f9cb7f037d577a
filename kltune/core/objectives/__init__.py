"""What the stages minimise: advantages, policy and value losses, preference losses, Bradley-Terry."""
