"""The shop's tables."""

from django.db import models


class Order(models.Model):
    article = models.TextField()

    class Meta:
        db_table = "shop_order"
