"""Many arms, and what they allow one to say."""
