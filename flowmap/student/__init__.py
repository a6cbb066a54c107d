"""A student as a user has it: its folder, its call, what lies beside its weights, and what may be merged onto them."""
