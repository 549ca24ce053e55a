"""Orders"""

from django.db import migrations, models


class Migration(migrations.Migration):
    operations = [  # noqa: RUF012
        migrations.CreateModel(
            name="Order",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                ("article", models.TextField()),
            ],
            options={"db_table": "shop_order"},
        ),
    ]
