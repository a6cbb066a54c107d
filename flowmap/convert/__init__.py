"""Converts published weights from other formats to folders that flowmap loads. No code in a pickle is executed."""
