"""The loss between student and teacher."""
