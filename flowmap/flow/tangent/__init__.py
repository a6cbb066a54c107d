"""The dual forward: a tensor that carries its tangent through an unmodified network, and the table of rules."""
