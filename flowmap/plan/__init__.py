"""What a recipe needs, in order: stages, folders, cards, dependencies, requirements."""
