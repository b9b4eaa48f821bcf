"""An application on SQLAlchemy with its defaults: argv is the driver, host:port, user and the application's name."""
import asyncio
import sys

from sqlalchemy import ForeignKey, create_engine, event, func, select, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

driver, address, user, me = sys.argv[1:5]
url = f"postgresql+{driver}://{user}@{address}/{user}"
schema = f"sa_{driver}_{me}"


class Base(DeclarativeBase):
    pass


class Owner(Base):
    __tablename__ = "owners"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    pets: Mapped[list["Pet"]] = relationship(back_populates="owner", cascade="all, delete-orphan")


class Pet(Base):
    __tablename__ = "pets"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    owner_id: Mapped[int] = mapped_column(ForeignKey("owners.id"))
    owner: Mapped[Owner] = relationship(back_populates="pets")


def work(session):
    for round in range(15):
        session.add(Owner(name=f"{me} {round}", pets=[Pet(name=f"{round}.{n}") for n in range(3)]))
        session.commit()
        assert session.scalar(text("SHOW search_path")) == schema
    session.add(Owner(name="gone"))
    session.flush()
    session.rollback()
    names = session.scalars(select(Owner.name).order_by(Owner.id)).all()
    assert names == [f"{me} {n}" for n in range(15)], names
    assert session.scalar(select(func.count(Pet.id))) == 45
    for n in range(1, 30):
        assert len(session.scalars(select(Owner).where(Owner.id.in_(range(1, n + 1)))).all()) == min(n, 15)
    with session.begin_nested():
        session.add(Owner(name="nested"))
    owner = session.scalars(select(Owner).where(Owner.name == "nested")).one()
    session.delete(owner)
    session.commit()
    streamed = session.execute(select(Pet.id).order_by(Pet.id).execution_options(yield_per=10)).scalars()
    assert len(list(streamed)) == 45
    session.commit()


def enter(engine):
    """Each connection sets its path when it is opened, as multi-tenant applications do."""

    @event.listens_for(engine, "connect")
    def connected(connection, _record):
        cursor = connection.cursor()
        cursor.execute(f"SET search_path = {schema}")
        cursor.close()
        connection.commit()


def plain():
    engine = create_engine(url)
    enter(engine)
    with engine.begin() as connection:
        connection.execute(text(f"DROP SCHEMA IF EXISTS {schema} CASCADE"))
        connection.execute(text(f"CREATE SCHEMA {schema}"))
        Base.metadata.create_all(connection)
    with Session(engine) as session:
        work(session)
    with engine.begin() as connection:
        Base.metadata.drop_all(connection)
        connection.execute(text(f"DROP SCHEMA {schema} CASCADE"))


async def asynchronous():
    engine = create_async_engine(url)
    enter(engine.sync_engine)
    async with engine.begin() as connection:
        await connection.execute(text(f"DROP SCHEMA IF EXISTS {schema} CASCADE"))
        await connection.execute(text(f"CREATE SCHEMA {schema}"))
        await connection.run_sync(Base.metadata.create_all)
    async with engine.connect() as connection:
        await connection.run_sync(lambda sync: work(Session(sync, join_transaction_mode="control_fully")))
    async with engine.begin() as connection:
        await connection.execute(text(f"DROP SCHEMA {schema} CASCADE"))
    await engine.dispose()


asyncio.run(asynchronous()) if driver == "asyncpg" else plain()
print("ok")
